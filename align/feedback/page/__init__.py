"""The labelling page: two answers side by side in a browser, and what people say of them into the store."""
