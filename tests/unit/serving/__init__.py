"""Which version answers: whole lives of a model with scripted runners, and the rules and parts one by one."""
