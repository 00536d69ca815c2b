"""`./build.sh boot-test`: a Debian that really boots, under systemd-nspawn, as the device. Needs root."""

DEVICE = "press-3"
QUESTION, ANSWER = "What is the capital of Spain?", "The capital of Spain is Madrid."
