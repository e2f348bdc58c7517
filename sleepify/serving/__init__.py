"""A server in OpenAI's form around sessions that sleep: who is served when, what is kept, and how it is said."""
