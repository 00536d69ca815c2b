"""`./build.sh machine-test`: a Debian with a kernel of its own, in an emulated machine, as the device. Needs root."""
