"use strict";
(() => {
  const make = (tag, text, name) => {
    const node = document.createElement(tag);
    if (text !== undefined) node.textContent = text;
    if (name) node.className = name;
    return node;
  };
  const side = (title, likely, token, name) => {
    const box = make("div", undefined, name);
    box.append(make("h4", title));
    for (const [text, share] of likely) {
      const row = make("div", undefined, text === token ? "likely taken" : "likely");
      const bar = make("i");
      bar.style.width = `${100 * share}%`;
      row.append(bar, make("code", text.replace(/\n/g, "\u23ce").replace(/^ | $/g, "\u2423")), make("span", share.toFixed(3)));
      box.append(row);
    }
    return box;
  };
  const source = document.getElementById("token-data");
  const data = source ? JSON.parse(source.textContent) : [];
  for (const heat of document.querySelectorAll(".heat")) {
    const detail = heat.querySelector(".detail");
    let chosen = null;
    const show = (token) => {
      if (chosen) chosen.classList.remove("chosen");
      chosen = token;
      token.classList.add("chosen");
      const [text, kl, ofStudent, ofTeacher, student, teacher] = data[Number(token.dataset.index)];
      const words = make("p");
      words.append(make("code", text.trim() ? text : JSON.stringify(text)), ` costs ${kl.toFixed(2)} nats. Entropy: student ${ofStudent.toFixed(2)}, teacher ${ofTeacher.toFixed(2)}.`);
      const sides = make("div", undefined, "sides");
      sides.append(side("student, without context", student, text, "student"), side("teacher, with the context", teacher, text, "in_context"));
      detail.replaceChildren(words, sides);
    };
    for (const line of heat.querySelectorAll(".tokens")) {
      const tokens = [...line.querySelectorAll(".t")];
      const go = (index) => {
        const next = tokens[Math.max(0, Math.min(tokens.length - 1, index))];
        for (const token of tokens) token.tabIndex = token === next ? 0 : -1;
        next.focus();
      };
      tokens.forEach((token, index) => {
        token.addEventListener("mouseenter", () => show(token));
        token.addEventListener("focus", () => show(token));
        token.addEventListener("click", () => go(index));
        token.addEventListener("keydown", (event) => {
          const to = { ArrowRight: index + 1, ArrowLeft: index - 1, Home: 0, End: tokens.length - 1 }[event.key];
          if (to === undefined) return;
          event.preventDefault();
          go(to);
        });
      });
    }
  }
  for (const game of document.querySelectorAll(".game")) {
    const frames = [...game.querySelectorAll(".frame")];
    const back = make("button", "back");
    const on = make("button", "next move");
    const where = make("span");
    let at = 0;
    const show = () => {
      frames.forEach((frame, index) => { frame.hidden = index !== at; });
      where.textContent = `board ${at + 1} of ${frames.length}`;
      back.disabled = at === 0;
      on.disabled = at === frames.length - 1;
    };
    back.addEventListener("click", () => { at -= 1; show(); });
    on.addEventListener("click", () => { at += 1; show(); });
    const steps = make("div", undefined, "steps");
    steps.append(back, on, where);
    game.append(steps);
    show();
  }
})();
