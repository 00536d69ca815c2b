"""A package of the agent's own wrapper, asked the way any MLflow program asks it."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def user(content: str, **options: Any) -> dict[str, Any]:
    return {"messages": [{"role": "user", "content": content}], **options}


class Answer:
    """A stream, read to its end: texts and a last item, or the chunks of a chat."""

    def __init__(self, items: list[Any]) -> None:
        self.deltas: list[str] = [item if isinstance(item, str) else delta(item) for item in items[:-1]]
        self.last: dict[str, Any] = items[-1]
        self.text = "".join(self.deltas)
        end = self.last["choices"][0] if "choices" in self.last else self.last
        self.finish_reason: str = end["finish_reason"]
        self.usage: dict[str, int] = self.last["usage"]


def delta(chunk: dict[str, Any]) -> str:
    """What a chunk of a completion adds."""
    text: str = chunk["choices"][0]["delta"].get("content", "")  # none beside calls
    return text


def ask(model: Any, row: dict[str, Any], **params: Any) -> Answer:
    return Answer(list(model.predict_stream(row, params=params)))


def load(folder: Path, **config: Any) -> Any:
    import mlflow.pyfunc

    return mlflow.pyfunc.load_model(str(folder), model_config=config)


def forget(model: Any) -> None:
    """Lets the next request begin with nothing kept."""
    model.unwrap_python_model()._engine.sessions.forget()
