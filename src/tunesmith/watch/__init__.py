"""A run as it goes: a live page on this machine and the same in the terminal."""
