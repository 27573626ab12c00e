// Brings the cells of a list, and the read-only fields of a form, up to date while the page is in view.
// The page is complete without this: what is fetched is the page itself.
const PERIOD_MS = 2000;
const CELLS = "#result_list tbody tr [class^='field-'], .readonly";

async function refresh() {
  const response = await fetch(location.href, { headers: { Accept: "text/html" } });
  if (!response.ok || response.redirected) {
    return;
  }
  const fresh = new DOMParser().parseFromString(await response.text(), "text/html").querySelectorAll(CELLS);
  const shown = document.querySelectorAll(CELLS);
  if (fresh.length !== shown.length) {
    return; // a row came or went; a reload shows it, and must not happen under somebody's hand
  }
  shown.forEach((cell, index) => {
    if (cell.innerHTML !== fresh[index].innerHTML && !cell.querySelector("input, select, textarea")) {
      cell.innerHTML = fresh[index].innerHTML;
    }
  });
}

for (;;) {
  await new Promise((resolve) => setTimeout(resolve, PERIOD_MS));
  if (document.visibilityState === "visible") {
    await refresh().catch(() => {}); // the server may be restarting; the next round tells
  }
}
