"""edge-agent: registered MLflow language models on an edge device, answering prompts over MQTT."""

__version__ = "0.1.0"
