"""Language models: loading them, reading the states that become keys, mixing neighbors in."""
