"""Names that a rank's process writes and the comparing process reads."""

BEGIN, END = "coalesced: begin", "coalesced: end"  # sends and receives between them go together
