"""How faithful each sketch is: scores against retraining, and against uncompressed influence."""
