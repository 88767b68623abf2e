"""Where things come from and go to."""
