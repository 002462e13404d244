"""What an installation says of itself: what is there (``info``), whether it is right (``compare``), what is fastest
(``tune``)."""
