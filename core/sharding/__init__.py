"""Where tensors live, and what a rule may ask about whole tensors. Pure data: no module of this folder communicates."""
