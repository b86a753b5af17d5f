"""Which requests are allowed, and when they run: routes, CORS, the fair queue, the prepared request."""
