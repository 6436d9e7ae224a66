// Render formulas, on pages (\(...\) from arithmatex) and in notebooks ($...$).
document$.subscribe(({ body }) => {
  renderMathInElement(body, {
    delimiters: [
      { left: "$$", right: "$$", display: true },
      { left: "\\[", right: "\\]", display: true },
      { left: "\\(", right: "\\)", display: false },
      { left: "$", right: "$", display: false },
    ],
    ignoredClasses: ["clipboard-copy-txt"], // the copy button's text must stay as it is
    throwOnError: false,
  });
});
