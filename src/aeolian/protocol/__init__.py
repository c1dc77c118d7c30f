"""The gRPC face that `modal` clients and containers talk to: one module per resource; holds no state."""
