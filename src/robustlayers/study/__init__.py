"""Studies: recipe x factors x seeds, their store, execution, and claims."""
