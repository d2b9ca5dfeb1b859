"""Other people's implementations, called the way their users call them; one file a vertical."""
