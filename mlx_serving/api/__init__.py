"""What clients see: parsing, authentication, formatting. Nothing but URLs and routes imports this package."""
