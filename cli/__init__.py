"""The command line, installed as ``dynrank_fx.cli``."""
