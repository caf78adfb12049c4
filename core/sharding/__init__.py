"""Where tensors live, and what a rule may ask about the whole of them: pure data. Nothing here communicates."""
