"""Generated input against everything that reads what others send: `./build.sh attack`, and in short in the default
run. The inputs that were found by hand are marked `attack` where they stand, with the tests of what they attack."""
