"""Insert plugins such as CBAM at named places of any backbone or neck."""
