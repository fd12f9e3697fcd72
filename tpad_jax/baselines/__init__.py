"""Rules and neighbours that every model is compared with."""
