"""What CBAM costs, and what it looks at."""
