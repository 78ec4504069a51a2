"""HTTP server of a loaded model: the chat API of OpenAI, metrics and a page to try it."""
