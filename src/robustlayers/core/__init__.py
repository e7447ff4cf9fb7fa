"""What every layer rests on: errors, durable files, identity, random streams, quantities, devices."""
