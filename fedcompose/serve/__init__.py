"""Answer with a verified release: an engine, an OpenAI-compatible endpoint and a page."""
