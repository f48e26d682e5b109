"""What leaves a hospital, and on which terms: its own policy."""
