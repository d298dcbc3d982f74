"""Helpers for configs, tables, files, log lines and messages, which all later rooms use."""
