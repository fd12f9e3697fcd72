"""Items to rows of features in a store."""
