"""What comes in and what goes out: nothing here knows the flow, and nothing here loads torch."""
