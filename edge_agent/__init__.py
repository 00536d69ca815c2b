"""edge-agent: runs registered MLflow language models on an edge device and answers prompts over MQTT."""

__version__ = "0.1.0"
