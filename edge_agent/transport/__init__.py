"""How prompts get in and answers get out: MQTT, and the control socket."""
