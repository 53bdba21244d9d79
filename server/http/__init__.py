"""HTTP: the app, keys, errors, events, limits, metrics, the drain. A request's clock starts
here."""
