"""Stand-ins for the experiments of the paper (arXiv 2509.15651) that two CPU cores hold."""
