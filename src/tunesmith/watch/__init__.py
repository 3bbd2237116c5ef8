"""A run as it goes: a live page on this machine."""
