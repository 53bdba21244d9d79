"""HTTP and text: the OpenAI API over an engine client. Token ids end here."""
