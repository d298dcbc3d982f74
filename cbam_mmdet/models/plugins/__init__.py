"""Plugins at named places of any backbone or neck."""
