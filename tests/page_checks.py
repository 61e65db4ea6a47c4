"""A page in; what a real browser makes of it, and what of it nobody could read, out."""

import shutil

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
QUIET = ("headless=new", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run", "disable-sync",
         "disable-background-networking", "disable-component-update")  # fmt: skip


class Browser:
    """A real browser, headless."""

    def __init__(self):
        from selenium import webdriver
        from selenium.webdriver.chrome.service import Service

        options = webdriver.ChromeOptions()
        options.binary_location = CHROMIUM
        for flag in QUIET:
            options.add_argument(f"--{flag}")
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        self.driver = webdriver.Chrome(options=options, service=Service(DRIVER))

    def open(self, address, width=1280, scheme="light"):
        """Open a page in a window of this width, for a user who likes it light or dark."""
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        features = [{"name": "prefers-color-scheme", "value": scheme}]
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
        self.driver.get("about:blank")  # which ends what a page before still asks its server for
        self.errors()
        self.driver.get(str(address))

    def run(self, script, *arguments):
        """What a script returns in the page."""
        return self.driver.execute_script(script, *arguments)

    def texts(self, selector):
        return self.run(
            "return [...document.querySelectorAll(arguments[0])].map(e => e.textContent)", selector
        )

    def press(self, key):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver).send_keys(key).perform()

    def errors(self):
        """What the page's console has complained of."""
        return [entry["message"] for entry in self.driver.get_log("browser")]


# Every text that is seen, and its contrast with what lies behind it: WCAG 2.2, 1.4.3.
LOW_CONTRAST = """
const channels = (colour) => colour.match(/[\\d.]+/g).map(Number);
const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
  .map((c) => (c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4))
  .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
function behind(node) {
  for (let at = node; at; at = at.parentElement) {
    const colour = channels(getComputedStyle(at).backgroundColor);
    if (colour.length < 4 || colour[3] === 1) return colour;
  }
  return [255, 255, 255];
}
const found = [];
for (const node of document.querySelectorAll("body *")) {
  const own = [...node.childNodes].some((child) => child.nodeType === 3 && child.textContent.trim());
  if (!own || node.closest("script, style, noscript") || !node.getClientRects().length) continue;
  if (node.closest(":disabled")) continue;
  const style = getComputedStyle(node);
  const colour = node.closest("svg") ? style.fill : style.color;
  const [a, b] = [light(channels(colour)), light(behind(node))].sort((x, y) => y - x);
  const contrast = (a + 0.05) / (b + 0.05);
  if (contrast < 4.5) found.push([node.textContent.trim().slice(0, 40), colour, contrast]);
}
return found;
"""


# Pairs of texts that lie over each other, among those that stand level.
OVERLAPS = """
const kinds = "svg text, .axis i, .bars > span, h1, h2, p, dt, dd, .caption, .verdict, label, th, td, "
  + "output, nav a";
const texts = [...document.querySelectorAll(kinds)]
  .filter((node) => node.textContent.trim() && node.getClientRects().length)
  .filter((node) => !/rotate\\((?!-?0\\b)/.test(node.getAttribute("transform") || ""))
  .map((node) => ({ node, box: node.getBoundingClientRect() }));
const found = [];
texts.forEach(({ node, box }, i) => texts.slice(i + 1).forEach((other) => {
  if (node.contains(other.node) || other.node.contains(node)) return;
  const width = Math.min(box.right, other.box.right) - Math.max(box.left, other.box.left);
  const height = Math.min(box.bottom, other.box.bottom) - Math.max(box.top, other.box.top);
  if (width > 1.5 && height > 1.5) found.push([node.textContent, other.node.textContent]);
}));
return found;
"""


# What is wider than its box and scrolls there, without a shadow at its edge that shows it.
SCROLLS_UNSEEN = """
return [...document.querySelectorAll("body *")]
  .filter((node) => ["auto", "scroll"].includes(getComputedStyle(node).overflowX))
  .filter((node) => node.scrollWidth > node.clientWidth + 1)
  .filter((node) => !getComputedStyle(node).backgroundAttachment.includes("local"))
  .map((node) => node.textContent.trim().slice(0, 40));
"""
