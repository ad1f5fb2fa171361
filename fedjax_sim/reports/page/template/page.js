(() => {
  "use strict";
  const one = (id) => document.getElementById(id);
  const holder = one("data");
  const KEY = "fedjax_sim report " + location.pathname;

  // --- what outlives a reload: zoom, choices, scroll -----------------------------------------------------
  const kept = (() => {
    try { return JSON.parse(sessionStorage.getItem(KEY)) || {}; } catch { return {}; }
  })();
  const open = () => [...document.querySelectorAll("details")].map((each) => [each.id, each.open]);
  const keep = (more) => {
    Object.assign(kept, more);
    try { sessionStorage.setItem(KEY, JSON.stringify(kept)); } catch { /* no storage: nothing is kept */ }
  };

  if (holder && window.uPlot) chart(JSON.parse(holder.textContent));

  function chart(data) {
    const numbers = (text, Kind) => {
      const bytes = Uint8Array.from(atob(text), (sign) => sign.charCodeAt(0));
      return new Kind(bytes.buffer);
    };
    const rounds = data.rounds.map((text) => numbers(text, Int32Array));
    const metricBox = one("metric"), columnBox = one("column"), logBox = one("log"), bandBox = one("band");
    const whole = one("whole"), place = one("chart"), legend = one("legend");
    const hidden = new Set(kept.hidden || []);
    let plot = null, shown = [], span = null;

    data.metrics.forEach(({ name, label }) => metricBox.add(new Option(name === label ? name : `${name}: ${label}`, name)));
    data.columns.forEach((name) => columnBox.add(new Option(name || "all", name)));
    if (data.columns.length < 2) one("of-column").hidden = true, one("of-column").style.display = "none";
    if (data.metrics.some(({ name }) => name === kept.metric)) metricBox.value = kept.metric;
    if (data.columns.includes(kept.column)) columnBox.value = kept.column;
    logBox.checked = !!kept.log;
    bandBox.checked = kept.band !== false;

    const css = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
    const DASHES = [[], [8, 4], [8, 3, 2, 3], [2, 3]];
    const styled = (row) => ({ colour: css("--c" + (row % 8)), dash: DASHES[Math.floor(row / 8) % 4] });
    const clear = (colour) => colour + "2e";
    const hex = (colour) => (/^#...$/.test(colour) ? "#" + [...colour.slice(1)].map((c) => c + c).join("") : colour);
    const said = (value) => {
      if (value == null || !isFinite(value)) return "–";
      const size = Math.abs(value);
      return size === 0 || (size >= 0.01 && size < 100) ? value.toFixed(4) : value.toPrecision(4);
    };

    function lines() {
      const metric = metricBox.selectedIndex, column = Math.max(columnBox.selectedIndex, 0);
      return data.curves.filter((curve) => curve.m === metric && curve.c === column).map((curve) => ({
        row: curve.r,
        name: data.rows[curve.r].name,
        seeds: curve.n,
        x: rounds[curve.x],
        mean: numbers(curve.y, Float32Array),
        spread: curve.s === null ? null : numbers(curve.s, Float32Array),
      }));
    }

    // Lines on the rounds that any of them has. Undefined: this line has no such round; null: no number there.
    function table(found, positive) {
      const all = [...new Set(found.flatMap(({ x }) => [...x]))].sort((a, b) => a - b);
      const at = new Map(all.map((round, index) => [round, index]));
      const number = (value) => (isFinite(value) && (!positive || value > 0) ? value : null);
      const columns = [all];
      for (const { x, mean, spread } of found) {
        const own = [0, 1, 2].map(() => new Array(all.length));
        x.forEach((round, index) => {
          const spot = at.get(round), middle = number(mean[index]);
          const half = spread && isFinite(spread[index]) ? spread[index] : 0;
          own[0][spot] = middle;
          own[1][spot] = middle === null ? null : number(middle + half);
          const low = middle === null ? null : middle - half;
          own[2][spot] = low !== null && positive && low <= 0 ? middle : low;
        });
        columns.push(...own);
      }
      return columns;
    }

    function draw(range) {
      shown = lines();
      const log = logBox.checked && shown.some(({ mean }) => mean.some((value) => value > 0));
      const values = table(shown, log);
      const banded = bandBox.checked;
      one("of-band").style.display = shown.some(({ spread }) => spread) ? "" : "none";
      const [first, last] = [values[0][0], values[0][values[0].length - 1]];
      span = first === last ? [first - 1, last + 1] : [first, last];
      const ink = css("--ink"), line = css("--line");
      const axis = { stroke: ink, grid: { stroke: line, width: 1 }, ticks: { stroke: line, width: 1 }, font: "12px system-ui, sans-serif" };
      const series = [{ label: "round" }], bands = [];
      const few = values[0].length <= 24;
      shown.forEach(({ row, name, spread }, index) => {
        const { colour, dash } = styled(row), visible = !hidden.has(name);
        const edge = { stroke: "transparent", width: 0, points: { show: false }, show: visible && banded && !!spread };
        series.push({ label: name, stroke: colour, width: 2, dash, show: visible, points: { show: few, size: 5, fill: colour } });
        series.push({ label: name + " +", ...edge }, { label: name + " -", ...edge });
        bands.push({ series: [3 * index + 2, 3 * index + 3], fill: clear(hex(colour)) });
      });
      const label = data.metrics[metricBox.selectedIndex].label;
      const whole_numbers = (u, splits) => splits.map((value) => (Number.isInteger(value) ? value.toLocaleString("en") : ""));
      if (plot) plot.destroy();
      plot = new uPlot({
        ...size(), series, bands,
        padding: [10, place.clientWidth < 480 ? 12 : 28, 0, 0],
        legend: { show: false },
        scales: { x: { time: false, range: (u, low, high) => (low == null ? span : low === high ? [low - 1, high + 1] : [low, high]) }, y: log ? { distr: 3 } : {} },
        axes: [
          { ...axis, label: "round", labelSize: 22, size: 36, labelFont: "13px system-ui, sans-serif", values: whole_numbers },
          { ...axis, label, labelSize: 22, labelFont: "13px system-ui, sans-serif", size: wide,
            values: log ? (u, splits) => splits.map((value) => (value == null ? "" : +value.toPrecision(3) + "")) : (u, splits) => ticks(splits) },
        ],
        cursor: { drag: { x: true, y: false, dist: 6 }, points: { size: 7 }, focus: { prox: 24 } },
        focus: { alpha: 0.35 },
        hooks: { setCursor: [tell], setScale: [scaled] },
      }, values, place);
      touch(plot);
      if (range) plot.setScale("x", range);
      names();
      tell(plot);
    }

    const ticks = (splits) => {
      const step = splits.length > 1 ? Math.abs(splits[1] - splits[0]) : 1;
      const digits = Math.min(8, Math.max(0, Math.ceil(-Math.log10(step) - 1e-9)));
      return splits.map((value) => (Math.abs(value) >= 1e5 || (step < 1e-6 && value) ? value.toExponential(1) : value.toFixed(digits)));
    };
    const wide = (u, values) => (place.clientWidth < 480 ? 16 : 20) + 7 * Math.max(3, ...(values || []).map((text) => (text || "").length));
    const size = () => ({ width: Math.max(place.clientWidth, 240), height: Math.round(Math.min(440, Math.max(290, window.innerHeight * 0.55))) });

    function scaled(u, key) {
      if (u !== plot || key !== "x") return;
      const { min, max } = u.scales.x;
      const full = min <= span[0] && max >= span[1];
      whole.disabled = full;
      keep({ range: full ? null : { min, max } });
    }

    function tell(u) {
      const spot = u.cursor.idx;
      legend.querySelectorAll("button").forEach((button, index) => {
        const own = u.data[3 * index + 1];
        let at = spot == null ? own.length - 1 : spot;
        while (at >= 0 && own[at] === undefined) at--;
        const middle = at < 0 ? null : own[at];
        const half = at >= 0 && middle != null && shown[index].spread ? u.data[3 * index + 2][at] - middle : null;
        const fixed = half >= 0.0001 && said(middle).split(".")[1]?.length === 4;
        const spread = half ? " ± " + (fixed ? half.toFixed(4) : said(half)) : "";
        button.querySelector(".v").textContent = said(middle) + spread;
      });
      const round = spot == null ? u.data[0][u.data[0].length - 1] : u.data[0][spot];
      legend.dataset.round = round;
      one("at").textContent = `round ${round.toLocaleString("en")}`;
    }

    function names() {
      legend.replaceChildren();
      const at = document.createElement("span");
      at.id = "at", at.className = "v", at.style.alignSelf = "center", at.style.minWidth = "6em";
      legend.append(at);
      shown.forEach(({ row, name, seeds }, index) => {
        const { colour, dash } = styled(row), button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", String(!hidden.has(name)));
        button.title = seeds > 1 ? `mean of ${seeds} seeds` : "one seed";
        const picture = document.createElementNS("http://www.w3.org/2000/svg", "svg");
        const stroke = document.createElementNS("http://www.w3.org/2000/svg", "line");
        for (const [key, value] of Object.entries({ width: 22, height: 8 })) picture.setAttribute(key, value);
        for (const [key, value] of Object.entries({ x1: 0, x2: 22, y1: 4, y2: 4, stroke: colour, "stroke-width": 2.5, "stroke-dasharray": dash.join(" ") })) stroke.setAttribute(key, value);
        picture.append(stroke);
        const text = document.createElement("span"), value = document.createElement("span");
        text.textContent = name, value.className = "v";
        button.append(picture, text, value);
        button.addEventListener("click", () => {
          const visible = hidden.has(name);
          visible ? hidden.delete(name) : hidden.add(name);
          button.setAttribute("aria-pressed", String(visible));
          plot.batch(() => {
            plot.setSeries(3 * index + 1, { show: visible });
            const edges = visible && bandBox.checked && !!shown[index].spread;
            for (const edge of [2, 3]) plot.setSeries(3 * index + edge, { show: edges });
          });
          keep({ hidden: [...hidden] });
        });
        button.addEventListener("mouseenter", () => plot.setSeries(3 * index + 1, { focus: true }));
        button.addEventListener("mouseleave", () => plot.setSeries(null, { focus: true }));
        legend.append(button);
      });
    }

    const reset = () => plot.setScale("x", { min: span[0], max: span[1] });

    // One finger sideways chooses a range of rounds, two fingers stretch it, two taps show the whole.
    function touch(u) {
      const over = u.over, points = new Map();
      let start = null, pinch = null, tapped = 0, drawn = false;
      const spot = (event) => event.clientX - over.getBoundingClientRect().left;
      const round = (x) => u.posToVal(x, "x");
      over.addEventListener("dblclick", (event) => { event.stopImmediatePropagation(); reset(); }, true);
      over.addEventListener("pointerdown", (event) => {
        if (event.pointerType !== "touch") return;
        points.set(event.pointerId, spot(event));
        if (points.size === 1) start = spot(event), drawn = false;
        if (points.size === 2) {
          const [a, b] = [...points.values()];
          pinch = { a: round(Math.min(a, b)), b: round(Math.max(a, b)) };
          u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        }
      });
      over.addEventListener("pointermove", (event) => {
        if (!points.has(event.pointerId)) return;
        points.set(event.pointerId, spot(event));
        u.setCursor({ left: spot(event), top: event.clientY - over.getBoundingClientRect().top });
        if (pinch && points.size === 2) {
          const [a, b] = [...points.values()].sort((x, y) => x - y), width = over.clientWidth;
          const scale = (pinch.b - pinch.a) / Math.max(b - a, 12);
          const low = Math.max(span[0], pinch.a - a * scale), high = Math.min(span[1], pinch.b + (width - b) * scale);
          if (high > low) u.setScale("x", { min: low, max: high });
        } else if (!pinch && Math.abs(spot(event) - start) > 8) {
          drawn = true;
          const [a, b] = [start, spot(event)].sort((x, y) => x - y);
          u.setSelect({ left: Math.max(a, 0), width: Math.min(b, over.clientWidth) - Math.max(a, 0), top: 0, height: over.clientHeight }, false);
        }
      });
      const lifted = (event) => {
        if (!points.delete(event.pointerId)) return;
        if (event.type === "pointerup" && drawn && !pinch && u.select.width > 8)
          u.setScale("x", { min: round(u.select.left), max: round(u.select.left + u.select.width) });
        else if (event.type === "pointerup" && !drawn && !pinch) {
          u.setCursor({ left: spot(event), top: event.clientY - over.getBoundingClientRect().top });
          const now = performance.now();
          if (now - tapped < 350) reset();
          tapped = now;
        }
        u.setSelect({ left: 0, width: 0, top: 0, height: 0 }, false);
        if (!points.size) pinch = null;
      };
      over.addEventListener("pointerup", lifted);
      over.addEventListener("pointercancel", lifted);
    }

    metricBox.addEventListener("change", () => { keep({ metric: metricBox.value, range: null }); draw(); });
    columnBox.addEventListener("change", () => { keep({ column: columnBox.value }); draw(kept.range); });
    logBox.addEventListener("change", () => { keep({ log: logBox.checked }); draw(kept.range); });
    bandBox.addEventListener("change", () => { keep({ band: bandBox.checked }); draw(kept.range); });
    whole.addEventListener("click", reset);
    let waiting = 0;
    addEventListener("resize", () => { cancelAnimationFrame(waiting); waiting = requestAnimationFrame(() => plot.setSize(size())); });
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => draw(kept.range));

    draw(kept.range);
    window.fedjaxSimChart = () => plot;  // for who looks closer, in the console and in tests
  }

  // --- copying ---------------------------------------------------------------------------------------------
  document.querySelectorAll(".copy").forEach((button) => button.addEventListener("click", async () => {
    const code = button.parentElement.querySelector("code");
    let done = true;
    try {
      await navigator.clipboard.writeText(code.textContent);
    } catch {
      getSelection().selectAllChildren(code);
      done = document.execCommand("copy");
    }
    button.textContent = done ? "Copied" : "Selected";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  }));

  // --- closed parts are printed too ------------------------------------------------------------------------
  let folded = [];
  addEventListener("beforeprint", () => {
    folded = [...document.querySelectorAll("details:not([open])")];
    folded.forEach((each) => { each.open = true; });
  });
  addEventListener("afterprint", () => folded.forEach((each) => { each.open = false; }));

  // --- reading itself again while the run is under way -----------------------------------------------------
  const every = Number(document.body.dataset.refresh || 0);
  if (every) {
    (kept.open || []).forEach(([id, was]) => { const found = id && one(id); if (found) found.open = was; });
    if (kept.scroll) scrollTo(0, kept.scroll);
    let paused = !!kept.paused, pressed = false;
    const pause = one("pause");
    const show = () => { pause.textContent = paused ? "Go on" : "Pause"; };
    pause.addEventListener("click", () => { paused = !paused; keep({ paused }); show(); });
    addEventListener("pointerdown", () => { pressed = true; });
    for (const end of ["pointerup", "pointercancel"]) addEventListener(end, () => { pressed = false; });
    setInterval(() => {
      const busy = pressed || paused || document.hidden || String(getSelection()) || document.activeElement?.tagName === "SELECT";
      if (busy) return;
      keep({ scroll: scrollY, open: open() });
      location.reload();
    }, 1000 * every);
    show();
  } else {
    keep({ scroll: 0 });
  }
})();
