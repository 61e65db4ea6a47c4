"""What the client and the evaluation server agree on."""

NAMES_PER_QUERY = 10  # gallery names, best first
SHAPE = '{"groupname": "…", "images": {"query.jpg": ["gallery.jpg", … ten names, best first]}}'
TOKEN = "X-Group-Token"  # the header that holds a group's token
