"""What strangers wrote: their code is called within bounds, and one error comes of it."""
