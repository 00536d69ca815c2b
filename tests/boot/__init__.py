"""`./build.sh boot-test`: a Debian that really boots, under systemd-nspawn, as the device. Needs root."""

DEVICE = "press-3"
