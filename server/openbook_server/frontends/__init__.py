"""`openbook serve --frontends N`: processes that speak gRPC, one that computes, and one that keeps both alive.

    callers ── HTTP/2 ──> front end (N of them, one port) ── records, a Unix socket ──> engine (models, index, sessions)

A front end (`frontend_process`) forwards whatever it is called with and never looks inside (`link`); the engine
(`engine_process`) serves these calls as it would serve those of its own port (`relay`). `records` is what travels between
them, `child` what every process does that the supervisor (`supervisor`) started.
"""
