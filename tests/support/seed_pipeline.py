"""The seed document's *Transformer Pipeline* project, as a user would run it: `python … FOLDER URI NAME`.

A Hugging Face folder becomes a `text-generation` pipeline, is logged with MLflow's transformers flavor as
`llm/v1/chat`, registered, and gets the alias `prod`. Prints the version.
"""

from __future__ import annotations

import sys

import mlflow
import transformers


def main() -> None:
    folder, uri, name = sys.argv[1:]
    mlflow.set_tracking_uri(uri)
    mlflow.set_experiment(f"pipeline-{name}")
    pipeline = transformers.pipeline(task="text-generation", model=folder)
    info = mlflow.transformers.log_model(
        transformers_model=pipeline,
        name="phi3-mlflow-model",
        model_config={"max_new_tokens": 300, "temperature": 0.2, "do_sample": True},
        task="llm/v1/chat",
        registered_model_name=name,
        pip_requirements=["transformers", "torch"],
    )
    client = mlflow.MlflowClient()
    client.set_registered_model_alias(name, "prod", info.registered_model_version)
    print(info.registered_model_version)


if __name__ == "__main__":
    main()
