"""Privacy of a hospital: its policy, differential privacy, and the account of what was spent."""
