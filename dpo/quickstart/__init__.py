"""The embedded quickstart: a tiny chat model, preference pairs and the script that makes both."""
