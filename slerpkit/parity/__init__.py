"""What two parents have in common, what differs, and what follows for the child; no weight is blended here."""
