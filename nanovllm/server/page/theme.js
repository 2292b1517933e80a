// Runs before the page is painted, so that a dark page never flashes white.
try {
  document.documentElement.dataset.theme = JSON.parse(localStorage.getItem("nanovllm.settings"))?.theme || "system";
} catch {
  document.documentElement.dataset.theme = "system";
}
