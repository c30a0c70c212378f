"""The command line `tensorrail`."""
