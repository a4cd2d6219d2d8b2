"""Static prompts by adversarial prompt tuning, and the token statistics that TAPT aligns to."""
