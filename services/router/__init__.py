"""The router: HTTP in, tokens out, and every request kept until its client has all of its tokens."""
